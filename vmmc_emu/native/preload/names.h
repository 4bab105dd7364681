/* names.h: what others ask of names.c. */
#ifndef PRELOAD_NAMES_H
#define PRELOAD_NAMES_H

#include <sys/socket.h>

/* Questions about interfaces, on any socket, for a process on a node: the node's.  0, -errno; -ENOTTY: not one. */
int names_ioctl(unsigned long request, void *argument);

/* Replaces an IPv4 or IPv6 address, but not its port, by the node's. */
void names_own_address(struct sockaddr *address);

/* What `open` is to give for a file whose text is another on a node (/etc/hosts); -1: it is the kernel's to open. */
int names_open(const char *path, int flags);

#endif
