"""What all else stands on: files written whole, names as they are shown, ranges of numbers."""
