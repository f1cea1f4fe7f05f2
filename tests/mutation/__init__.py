"""Takes the guards of private rounds out, one at a time, and sees whether a test notices."""
