"""What is resident, what is locked, and what goes: imported by the caches and by ``export``
only."""
