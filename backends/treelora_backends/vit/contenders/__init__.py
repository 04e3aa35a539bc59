"""What contenders of ``treelora compare`` do with a vision transformer."""
