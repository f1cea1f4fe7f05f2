"""Metrics for Prometheus, of one coordinator or one helper: each in a registry of its own, at `/metrics`.

    families    how a metric is written
    calls       what only calls know, over gRPC and HTTP
    inferences  questions to models, and which version answers
    others      how helper and database do
    rounds      tasks, rounds and sessions, as the store has them
    drift       whether the data of a task's devices have changed
    fleet       devices, and what they tell of their sessions
    releases    rollouts, holds, listings that wait or end
    books       audit, privacy, certificates, the disk
    page        what a scrape gets
    monitor     puts a coordinator's together
    helper      the same for a helper

What the store knows is read from it at each scrape, on a thread, and counts on where it was after a restart; what only
calls know begins at 0 with the process. Labels are names that operators or makers of models gave, and words of a fixed
list: never devices, never what a caller wrote. Nothing here is imported unless somebody asked for the port.
"""
