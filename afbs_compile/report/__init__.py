"""What the user reads: the table of sites."""
