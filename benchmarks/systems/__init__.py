"""What training costs: time, memory, and which models fit on a chip."""
