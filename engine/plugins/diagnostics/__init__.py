"""What the server remembers of earlier chats, bounded: to say why one missed the cache."""
