"""The shortest program that shows that it ran."""

print("hello from the sandbox")
