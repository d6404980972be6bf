"""Using a model: texts, chats, and tasks of lm-eval."""
