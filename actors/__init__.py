"""Ray actors and their handles: lifecycle, placement, deadlines. Decisions live in `esper/`."""
