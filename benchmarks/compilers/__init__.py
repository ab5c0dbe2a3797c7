"""Train steps compiled for chips that need not be there."""
