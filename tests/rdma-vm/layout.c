/* Prints sizes and offsets of the installed <infiniband/verbs.h>; net's layout test compares its own
 * declarations (net/src/verbs/ffi.rs) with these lines. */
#include <infiniband/verbs.h>
#include <stddef.h>
#include <stdio.h>

#define SIZE(s) printf(#s " size %zu\n", sizeof(struct s))
#define AT(s, f) printf(#s " " #f " %zu\n", offsetof(struct s, f))
#define AS(s, f, name) printf(#s " " name " %zu\n", offsetof(struct s, f))

int main(void)
{
	AT(ibv_context, ops.alloc_mw); AT(ibv_context, ops.dealloc_mw);
	AT(ibv_context, ops.poll_cq); AT(ibv_context, ops.req_notify_cq);
	AT(ibv_context, ops.post_send); AT(ibv_context, ops.post_recv);
	AT(ibv_context, async_fd);
	SIZE(ibv_device_attr); AT(ibv_device_attr, max_qp_wr); AT(ibv_device_attr, device_cap_flags);
	AT(ibv_device_attr, max_sge); AT(ibv_device_attr, max_cqe); AT(ibv_device_attr, max_qp_rd_atom);
	AT(ibv_device_attr, max_qp_init_rd_atom); AT(ibv_device_attr, max_mw); AT(ibv_device_attr, max_pkeys);
	AT(ibv_device_attr, phys_port_cnt);
	SIZE(ibv_async_event); AT(ibv_async_event, event_type);
	SIZE(ibv_mw); AT(ibv_mw, rkey);
	SIZE(ibv_mw_bind_info); AT(ibv_mw_bind_info, addr); AT(ibv_mw_bind_info, length);
	AT(ibv_mw_bind_info, mw_access_flags);
	SIZE(ibv_mr); AT(ibv_mr, lkey); AT(ibv_mr, rkey);
	SIZE(ibv_comp_channel); AT(ibv_comp_channel, fd);
	AT(ibv_cq, channel); AT(ibv_cq, cqe);
	AT(ibv_qp, qp_num);
	SIZE(ibv_wc); AT(ibv_wc, wr_id); AT(ibv_wc, status); AT(ibv_wc, opcode); AT(ibv_wc, byte_len);
	AT(ibv_wc, imm_data); AT(ibv_wc, qp_num); AT(ibv_wc, wc_flags);
	SIZE(ibv_sge); AT(ibv_sge, addr); AT(ibv_sge, length); AT(ibv_sge, lkey);
	SIZE(ibv_send_wr); AT(ibv_send_wr, sg_list); AT(ibv_send_wr, num_sge); AT(ibv_send_wr, opcode);
	AT(ibv_send_wr, send_flags); AT(ibv_send_wr, imm_data);
	AS(ibv_send_wr, wr.rdma.remote_addr, "remote_addr"); AS(ibv_send_wr, wr.rdma.rkey, "rkey");
	AS(ibv_send_wr, bind_mw.mw, "bind_mw"); AS(ibv_send_wr, bind_mw.rkey, "bind_rkey");
	AS(ibv_send_wr, bind_mw.bind_info, "bind_info");
	SIZE(ibv_recv_wr); AT(ibv_recv_wr, sg_list); AT(ibv_recv_wr, num_sge);
	SIZE(ibv_qp_cap); AT(ibv_qp_cap, max_inline_data);
	SIZE(ibv_qp_init_attr); AT(ibv_qp_init_attr, send_cq); AT(ibv_qp_init_attr, recv_cq);
	AT(ibv_qp_init_attr, cap); AT(ibv_qp_init_attr, qp_type); AT(ibv_qp_init_attr, sq_sig_all);
	SIZE(ibv_global_route); AT(ibv_global_route, dgid); AT(ibv_global_route, flow_label);
	AT(ibv_global_route, sgid_index); AT(ibv_global_route, hop_limit);
	AT(ibv_global_route, traffic_class);
	SIZE(ibv_ah_attr); AT(ibv_ah_attr, grh); AT(ibv_ah_attr, dlid); AT(ibv_ah_attr, sl);
	AT(ibv_ah_attr, is_global); AT(ibv_ah_attr, port_num);
	SIZE(ibv_qp_attr); AT(ibv_qp_attr, path_mtu); AT(ibv_qp_attr, rq_psn); AT(ibv_qp_attr, dest_qp_num);
	AT(ibv_qp_attr, qp_access_flags); AT(ibv_qp_attr, ah_attr); AT(ibv_qp_attr, pkey_index);
	AT(ibv_qp_attr, max_rd_atomic); AT(ibv_qp_attr, max_dest_rd_atomic); AT(ibv_qp_attr, min_rnr_timer);
	AT(ibv_qp_attr, port_num); AT(ibv_qp_attr, timeout); AT(ibv_qp_attr, rnr_retry);
	AT(ibv_qp_attr, rate_limit);
	AT(ibv_port_attr, active_mtu); AT(ibv_port_attr, gid_tbl_len); AT(ibv_port_attr, lid);
	AT(ibv_port_attr, link_layer);
	AT(ibv_port_attr, port_cap_flags2);
	return 0;
}
