"""What is done to parts and runs as a whole: mended, cleaned, removed, renamed, copied, exported."""
