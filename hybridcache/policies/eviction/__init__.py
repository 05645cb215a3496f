"""What is evicted first: one file an algorithm, and what several of them share."""
