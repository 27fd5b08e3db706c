"""What watches the quality of sparse calls while a model runs, and what it does once too much of it is lost."""
