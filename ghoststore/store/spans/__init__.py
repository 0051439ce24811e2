"""What is committed span by span: its layout, reading and writing."""
