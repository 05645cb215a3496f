"""Watch page: a cache's changes as records, and the page that draws them.

README.md in this folder describes the records.
"""
