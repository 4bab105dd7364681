/* names.h: what others ask of names.c. */
#ifndef PRELOAD_NAMES_H
#define PRELOAD_NAMES_H

/* Questions about interfaces, on any socket, for a process on a node: the node's.  0, -errno; -ENOTTY: not one. */
int names_ioctl(unsigned long request, void *argument);

/* What `open` is to give for a file whose text is another on a node (/etc/hosts); -1: it is the kernel's to open. */
int names_open(const char *path, int flags);

#endif
