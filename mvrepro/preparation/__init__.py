"""Sets of faces before anything reads them: fetched, found and aligned. No training knows of it."""
