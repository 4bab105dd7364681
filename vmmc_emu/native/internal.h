/*
 * internal.h: what libvmmc shows to libvmmc-preload besides the public vmmc.h.
 *
 * The preload library lies in every program on a node, in front of whatever symbols the program has:
 * a helper of ours called socket_new could be bound in place of the program's own.  So the functions of
 * endpoint.h, wait.h, fault.h and socket.h carry a prefix that nobody else uses in the object files, and their
 * plain names in the source.  They are not an interface for programs and change without notice.
 */
#ifndef VMMC_INTERNAL_H
#define VMMC_INTERNAL_H

/* Around the declarations of these headers: visible although libvmmc hides its symbols otherwise. */
#define VMMC_INTERNAL_BEGIN _Pragma("GCC visibility push(default)")
#define VMMC_INTERNAL_END _Pragma("GCC visibility pop")

#define endpoint_attach vmmc_i_endpoint_attach
#define endpoint_detach vmmc_i_endpoint_detach
#define endpoint_default vmmc_i_endpoint_default
#define endpoint_current vmmc_i_endpoint_current
#define endpoint_is_ours vmmc_i_endpoint_is_ours
#define endpoint_on_fork vmmc_i_endpoint_on_fork
#define endpoint_private_descriptor vmmc_i_endpoint_private_descriptor
#define endpoint_descriptor_is_private vmmc_i_endpoint_descriptor_is_private
#define endpoint_private_close vmmc_i_endpoint_private_close
#define endpoint_give_memory vmmc_i_endpoint_give_memory
#define endpoint_give_waker vmmc_i_endpoint_give_waker
#define endpoint_ring_slot vmmc_i_endpoint_ring_slot
#define endpoint_let_nic_catch_up vmmc_i_endpoint_let_nic_catch_up
#define endpoint_let_nic_look vmmc_i_endpoint_let_nic_look
#define endpoint_ring_commands vmmc_i_endpoint_ring_commands
#define endpoint_commit vmmc_i_endpoint_commit

#define wait_thread vmmc_i_wait_thread /* also the struct of that name */
#define wait_put_off_end vmmc_i_wait_put_off_end
#define wait_give_way vmmc_i_wait_give_way
#define wait_poll vmmc_i_wait_poll
#define wait_until vmmc_i_wait_until
#define wait_signals_now vmmc_i_wait_signals_now
#define wait_interrupted vmmc_i_wait_interrupted

#define fault_guard vmmc_i_fault_guard
#define fault_copy vmmc_i_fault_copy
#define fault_recover vmmc_i_fault_recover

#define socket_new vmmc_i_socket_new
#define socket_release vmmc_i_socket_release
#define socket_close vmmc_i_socket_close
#define socket_bind vmmc_i_socket_bind
#define socket_listen vmmc_i_socket_listen
#define socket_accept vmmc_i_socket_accept
#define socket_connect vmmc_i_socket_connect
#define socket_shutdown vmmc_i_socket_shutdown
#define socket_send vmmc_i_socket_send
#define socket_receive vmmc_i_socket_receive
#define socket_name vmmc_i_socket_name
#define socket_getsockopt vmmc_i_socket_getsockopt
#define socket_setsockopt vmmc_i_socket_setsockopt
#define socket_ioctl vmmc_i_socket_ioctl
#define socket_ready vmmc_i_socket_ready
#define socket_edges vmmc_i_socket_edges /* also the struct of that name */
#define socket_set_watch vmmc_i_socket_set_watch
#define socket_wait_words vmmc_i_socket_wait_words
#define socket_readiness_of_slot vmmc_i_socket_readiness_of_slot
#define socket_route_of vmmc_i_socket_route_of
#define socket_address_is_local vmmc_i_socket_address_is_local
#define socket_place vmmc_i_socket_place
#define socket_port_is_kernels vmmc_i_socket_port_is_kernels

#endif
