"""Problems that are generated: countdown and sudoku."""
