"""What the browser device serves: a page and the worker in it. No Python here."""
