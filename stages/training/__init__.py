"""What training is made of: conversations as tokens and batches, and the fast path of the CPU."""
