"""Bytes between two kernels: files in a folder that both see, and nothing else in common.

Windows and WSL2 do not share memory, nor a page cache, nor locks. What they can share is a folder.
There each process has a *lane*, a file that it alone writes; a peer reads it, checks what it read,
and says so on the connection. `lane` is the file, `wire` what goes over the connection, `stream`
one connection's part in it, `probe` finds out whether that is right, and faster than TCP.
"""
