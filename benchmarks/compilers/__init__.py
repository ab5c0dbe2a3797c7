"""What compilers for chips that need not be there make of a train step."""
