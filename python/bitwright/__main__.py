"""`python -m bitwright` is `bitwright`."""

from bitwright.cli import main

main()
