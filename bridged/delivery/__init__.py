"""What leaves: the senders and their pace. In the order to read it:

delivery   the dispatcher: takes parcels, sends them, settles what became of them
transport  the one HTTP call: bytes out, a verdict back
blame      whose fault a failure is: of what is in a request, or of the road
aside      single events that wait and ask now and then
archiver   what is too old, on its way into the archive
pacing     how fast: two control loops and one backoff
probe      whether a credential is good, asked before it is used
"""
