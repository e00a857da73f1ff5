"""`python -m bitwright` is `bitwright`."""

from bitwright.launch import main

main()
