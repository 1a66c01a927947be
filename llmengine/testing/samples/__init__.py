"""Sample cases, one file per operator, each with a list OPERATORS of `llmengine.testing.Operator`."""
