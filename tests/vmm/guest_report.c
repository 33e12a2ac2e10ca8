/* Takes a TDREPORT through /dev/tdx_guest, with the report data 0, 1, 2, ..., and prints it in hex. */
#include <fcntl.h>
#include <linux/tdx-guest.h>
#include <stdio.h>
#include <sys/ioctl.h>

int main(void)
{
	static struct tdx_report_req request;
	int fd = open("/dev/tdx_guest", O_RDWR | O_SYNC);

	for (int i = 0; i < TDX_REPORTDATA_LEN; i++)
		request.reportdata[i] = i;
	if (fd < 0 || ioctl(fd, TDX_CMD_GET_REPORT0, &request)) {
		perror("tdx_guest");
		return 1;
	}
	for (int i = 0; i < TDX_REPORT_LEN; i++)
		printf("%02x", request.tdreport[i]);
	printf("\n");
	return 0;
}
