"""Studies of what each bit costs: sums, dot products and attention in few bits, and a language model per scheme."""
