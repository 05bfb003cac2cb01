"""What all else stands on: files written whole, names as shown, places, ranges of numbers."""
