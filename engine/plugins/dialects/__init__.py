"""The protocols that clients speak: each is translated into one chat request and out of one stream
of events."""
