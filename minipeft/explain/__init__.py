"""What a method does, shown."""
