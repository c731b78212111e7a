"""The doors: framing, authentication and back-pressure, nothing else. In the order to read it:

http, stream                  what a request, and a line, comes to
http_answers                  what the HTTP door says
http_connections, shares      time, number and memory of its connections; whose the bytes are that they hold
known_head                    the same head again, which needn't be parsed
first_line                    what a stream may begin with
expansion                     compressed bodies
clients                       how many connections one client has, and what is refused
tcp, tls, unix                what only these know
cohorts                       Mixpanel's pages of cohorts, at the HTTP door
"""
