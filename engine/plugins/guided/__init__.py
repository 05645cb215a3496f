"""What an answer must look like, and which tokens can come next for it to."""
