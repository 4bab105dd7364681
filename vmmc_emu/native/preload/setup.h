/* setup.h: making, naming and connecting sockets, and turning one into the kernel's. */
#ifndef PRELOAD_SETUP_H
#define PRELOAD_SETUP_H

#include "descriptors.h"

void setup_forget_options(struct file *f);

/* A kernel socket or datagram towards one of the cluster's addresses would go to the real network.
 * True: it is refused, errno says ENETUNREACH and stderr why. */
bool setup_refuses(int fd, const struct sockaddr *address, socklen_t length);

#endif
