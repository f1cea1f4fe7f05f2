"""The store's tables, step by step. Never edit a step that has been released: add the next one."""
