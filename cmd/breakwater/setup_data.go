package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"breakwater/storage"

	"github.com/spf13/cobra"
)

func setupDataCommand(usual string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "data",
		Short: "Make the data folder for a mirror that runs as another user",
		Long: `Make the data folder, if there is none, and hand it to the user and group that the mirror will run as, with
mode 0700. Run it as root; of root's capabilities it needs CAP_CHOWN, and none at all where nothing is to be
done. A folder that is that user's already is left as it is, with all that is in it.

A store that is another user's is refused, unless --recursive hands over all that is in it. No symbolic link is
followed, and what is in there and belongs to neither user makes it fail before anything is changed. No mirror
may run on the store meanwhile.`,
		Example: `  breakwater setup data --owner 65532:65532
  breakwater setup data --owner 65532:65532 --data /srv/breakwater
  breakwater setup data --owner 65532:65532 --recursive   # a store that root's mirror has filled`,
		Args: noArguments,
	}
	load := configFlag(cmd, usual).load
	dataFlag(cmd)
	owner := cmd.Flags().String("owner", "", "`UID:GID` that the mirror will run as")
	recursive := cmd.Flags().Bool("recursive", false, "hand over all that is in it too")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		who, err := parseOwner(*owner)
		if err != nil {
			return err
		}
		cfg, err := load()
		if err != nil {
			return err
		}
		give := storage.GiveEmpty
		if *recursive {
			give = storage.GiveAll
		}
		given, err := storage.Give(cfg.Data, who, give)
		if err != nil {
			return err
		}
		if !given {
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is %s's already\n", cfg.Data, who)
			return err
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is %s's now\n", cfg.Data, who)
		return err
	}
	return cmd
}

func parseOwner(s string) (owner storage.Owner, err error) {
	user, group, _ := strings.Cut(s, ":")
	uid, err := strconv.ParseUint(user, 10, 31)
	gid, gerr := strconv.ParseUint(group, 10, 31)
	if errors.Join(err, gerr) != nil {
		return owner, usageError{fmt.Errorf("--owner %q: write the numbers of a user and a group, such as 65532:65532", s)}
	}
	return storage.Owner{User: int(uid), Group: int(gid)}, nil
}
