"""The loop, its optimizer, its state, its hardware."""
