"""Problems of the library reasoning-gym."""
