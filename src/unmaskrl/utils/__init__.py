"""Files and text; torch in one file only."""
