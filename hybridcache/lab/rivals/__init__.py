"""What a cache is compared with: other engines' caches, textbook policies, the offline optimum."""
