"""Other libraries' models on llmengine's operators; each room imports its library, and nothing imports the rooms."""
