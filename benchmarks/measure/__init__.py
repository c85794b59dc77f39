"""How fast something is on this machine, and whether it is right."""
