"""Stage two: students, their losses, training, evaluation and export."""
