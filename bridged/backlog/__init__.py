"""What waits: segments in a SQLite spool, the oldest of them in memory. In the order to read it:

records, segment    what comes, what waits, what is settled; the unit of durability and of delivery
spool               the file's one owner: the writer, its transaction, the rows that are read
tables              what is done to the file in the connection's thread
company, placement  when a commit begins, and on which CPU it runs
accounts            the books: what became of every event
backlog             the queue over it: the ring in memory, leases, the order
dead_letters        what couldn't be delivered: looked at, tried again, purged
archive             where expired events go
reserve             the room on the disk, and a ballast for when there is none
witness             what the lock file remembers, if the file itself doesn't
salvage, pages      what a start does about a damaged file
"""
