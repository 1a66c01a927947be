"""Fine-tuning tasks: what people train a model for, from rows of data to judged answers."""

from __future__ import annotations

from llmengine.tasks.task import FILE, TASKS, Answer, Row, Task, TaskExamples, load, make

__all__ = ["FILE", "TASKS", "Answer", "Row", "Task", "TaskExamples", "load", "make"]
