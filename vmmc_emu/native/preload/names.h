/* names.h: what others ask of names.c. */
#ifndef PRELOAD_NAMES_H
#define PRELOAD_NAMES_H

#include <sys/socket.h>

/* Questions about interfaces, on any socket, for a process on a node: the node's.  0, -errno; -ENOTTY: not one. */
int names_ioctl(unsigned long request, void *argument);

/* Replaces an IPv4 or IPv6 address, but not its port, by the node's. */
void names_own_address(struct sockaddr *address);

/* The node's files are beside the daemon's socket. */
void names_begin(const char *socket);

/* The path of what a program on a node finds under this one: another for /etc/hosts and its like. */
const char *names_file(const char *path);
/* The same for who opens it so: who writes has the machine's. */
const char *names_opened(const char *path, int flags);

#endif
