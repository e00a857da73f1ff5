"""What is made of a matrix's statistics before it is rounded: a factor of H, and the target."""
