//! How much memory is to be had: what the machine has available, or what the limits of the control groups that this process
//! is in (a container's, a service's) leave, whichever is less.

use std::path::Path;

/// Names of what a version of control groups says about one group's memory.
struct Files {
    /// Where the groups are.
    root: &'static str,
    limit: &'static str,
    used: &'static str,
    /// The line of `memory.stat` with what the group's limit counts as used, but the system takes back when it is needed.
    reclaimable: &'static str,
}

const V2: Files = Files {
    root: "/sys/fs/cgroup",
    limit: "memory.max",
    used: "memory.current",
    reclaimable: "inactive_file",
};
const V1: Files = Files {
    root: "/sys/fs/cgroup/memory",
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    reclaimable: "total_inactive_file",
};

/// Bytes of memory that are free for this process, where the system says.
pub(crate) fn free_memory() -> Option<u64> {
    free(|path| std::fs::read_to_string(path).ok())
}

/// The same, of a system whose files `read` gives.
fn free(read: impl Fn(&Path) -> Option<String>) -> Option<u64> {
    let machine = read(Path::new("/proc/meminfo"))
        .and_then(|text| Some(number(&text, "MemAvailable:")?.saturating_mul(1 << 10)));
    let groups = read(Path::new("/proc/self/cgroup")).unwrap_or_default();
    let limits = groups.lines().filter_map(|line| limit(line, &read));
    limits.chain(machine).min()
}

/// What the limits of a line's group, and of those it is in, leave; `None` if the line is not about memory, or there is no limit.
/// A container may name its group as the host does, and see it as the root: groups that are not there are passed over.
fn limit(line: &str, read: &impl Fn(&Path) -> Option<String>) -> Option<u64> {
    let mut parts = line.splitn(3, ':').skip(1);
    let (controllers, group) = (parts.next()?, parts.next()?);
    let files = match controllers {
        "" => V2,
        _ if controllers.split(',').any(|name| name == "memory") => V1,
        _ => return None,
    };
    let left = |group: &Path| {
        let place = Path::new(files.root).join(group.strip_prefix("/").ok()?);
        let value = |file| read(&place.join(file))?.trim().parse::<u64>().ok();
        let (limit, used) = (value(files.limit)?, value(files.used)?);
        let stat = read(&place.join("memory.stat")).unwrap_or_default();
        let reclaimable = number(&stat, files.reclaimable).unwrap_or(0);
        Some(limit.saturating_sub(used.saturating_sub(reclaimable)))
    };
    Path::new(group).ancestors().filter_map(left).min()
}

/// The number behind a name at a line's start.
fn number(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().map(str::split_whitespace);
    lines.find_map(|mut words| words.next().filter(|first| *first == name).and(words.next()))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal:  9000 kB\nMemAvailable:    8000 kB\n";

    fn free_of(files: &[(&str, &str)]) -> Option<u64> {
        free(|path| {
            let file = files.iter().find(|(name, _)| Path::new(name) == path)?;
            Some(file.1.to_owned())
        })
    }

    #[test]
    fn without_limits_it_is_what_the_machine_has() {
        assert_eq!(free_of(&[]), None);
        assert_eq!(free_of(&[("/proc/meminfo", "MemTotal: 9000 kB\n")]), None);
        assert_eq!(free_of(&[("/proc/meminfo", MEMINFO)]), Some(8000 << 10));
        let unlimited = [
            ("/proc/meminfo", MEMINFO),
            ("/proc/self/cgroup", "0::/a\n"),
            ("/sys/fs/cgroup/a/memory.max", "max\n"),
            ("/sys/fs/cgroup/a/memory.current", "5000\n"),
        ];
        assert_eq!(free_of(&unlimited), Some(8000 << 10));
    }

    #[test]
    fn the_narrowest_group_counts_without_what_can_be_taken_back() {
        let mut files = vec![
            ("/proc/meminfo", MEMINFO),
            ("/proc/self/cgroup", "1:cpu,cpuacct:/elsewhere\n0::/pod/worker\n"),
            ("/sys/fs/cgroup/pod/worker/memory.max", "7000\n"),
            ("/sys/fs/cgroup/pod/worker/memory.current", "1000\n"),
            ("/sys/fs/cgroup/pod/memory.max", "9000\n"),
            ("/sys/fs/cgroup/pod/memory.current", "5000\n"),
            ("/sys/fs/cgroup/pod/memory.stat", "anon 4500\ninactive_file 500\nactive_file 0\n"),
        ];
        assert_eq!(free_of(&files), Some(4500));
        files[5].1 = "9600\n";
        assert_eq!(free_of(&files), Some(0), "over the limit");
        // A container's own root has its limit.
        files.push(("/sys/fs/cgroup/memory.max", "100\n"));
        files.push(("/sys/fs/cgroup/memory.current", "40\n"));
        files[5].1 = "5000\n";
        assert_eq!(free_of(&files), Some(60));
    }

    #[test]
    fn the_first_version_has_a_hierarchy_for_memory() {
        let files = [
            ("/proc/meminfo", MEMINFO),
            ("/proc/self/cgroup", "4:memory,hugetlb:/docker/1a2b\n1:cpu:/\n0::/\n"),
            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "6000\n"),
            ("/sys/fs/cgroup/memory/memory.usage_in_bytes", "3000\n"),
            ("/sys/fs/cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 200\n"),
        ];
        assert_eq!(free_of(&files), Some(3200));
    }
}
