"""What each bit costs: sums, dot products and attention in few bits, and a language model under every scheme."""
