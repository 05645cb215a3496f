"""What people look at: a cache's changes as records, and the page that draws them, live or as a
recording. The records are described in README.md beside this file."""
